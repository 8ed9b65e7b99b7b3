"""stagewise: train deep vision networks with local losses.

The rooms, from the top floor down; a module imports from its own room and from rooms below it, never from above:

* ``train``: the command; from ``train.main`` to the gradient it is two hops
* ``training``: the loop, where a run goes on, what it leaves
* ``detection``: a trained backbone in Detectron2
* ``analysis``: what the papers look at, reports, exports
* ``pipeline``: segments spread over ranks, with gradient boundaries between them
* ``evaluation``: run folders, features, k-NN, linear evaluation
* ``checkpoints``: what is saved, how, and how long it stays
* ``engines``: DeepSpeed, DDP, sharding, CUDA graphs: gradients over ranks, and the optimizer's step
* ``cost``: parameters, FLOPs and activations, counted
* ``model``: from names to a network that trains with local losses
* ``execution``: every segment runs once, gradients are routed by hand
* ``local``: local units and plans, heads, objectives, one file per method
* ``network``: any network as a list of segments; the networks that timm lacks
* ``data``: shards, packing, loading, views
* ``optim``: LARS, steps that are skipped, parameter groups, the learning rate
* ``tracking``: the log of a run, progress, trackers, status
* ``config``: recipes: their schema, composition and checks
* ``runtime``: ranks, launch, requests and signals, watchdog, the lock of a run, errors, files
"""
