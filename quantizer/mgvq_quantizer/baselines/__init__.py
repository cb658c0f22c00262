"""Published quantizers behind one interface, beside our own (run by `mgvq-eval compare`).

`interface` says what a baseline is, `methods` lists them, one file holds each. `through_model`
applies one to a model as our own quantizer is applied; `ours` names our own and its ablations.
`bench` runs one, `comparison` many, `rows` keeps what came out, `tables` and `plot` show it.
No baseline writes a checkpoint: they are here to be compared, not to be served.
"""
