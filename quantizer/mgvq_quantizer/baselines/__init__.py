"""Published quantizers behind one interface, to measure ours against (run by `mgvq-eval compare`).

`interface` says what a baseline is, `methods` lists them, one file holds each. `through_model`
applies one to a model as our own quantizer is applied, `comparison` scores many of them.
None of them writes a checkpoint: they are here to be compared, not to be served.
"""
