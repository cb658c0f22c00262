"""Where keys and values of running requests live.

In: how many tokens a request has. Out: which slots of the pool hold them. Start at
`block_manager.BlockManager.allocate`; `kv_cache.KVCache` owns the tensors. Never decides who runs
(that is `engine.scheduler`, which calls this room). Next room down: `mgvq_runtime.layers`.
"""
