"""Pipeline stages with gradient boundaries, on DeepSpeed's pipeline engine. See ``README.md`` beside this file.

* ``engine``: the stages as one ``Engine`` of the training loop
* ``scheduling``: which stage has which segments, and in which order it works; pure functions, no processes
* ``rank``: how one rank carries a schedule out: its stage, its messages, its micro-batches
* ``timeline``: pictures and traces of what the stages did when
"""
