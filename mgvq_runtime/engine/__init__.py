"""The loop that turns requests into tokens.

In: `Request`s through `Engine.add`. Out: `RequestOutput`s from `Engine.step`. Start at
`engine.Engine.step`: schedule, encode, run, sample, commit. One thread calls it; it knows no HTTP,
no asyncio and no file but the checkpoint. Next rooms down: `mgvq_runtime.cache` and
`mgvq_runtime.models`.
"""
