"""Hands damaged and forged files to every command, as a stranger might, and judges what happens.

    python -m tests.support.attacks.strangers --cases 20000 --seed 0

world.py      one small real thing of every kind that can be passed on, and a folder beside them
documents.py  each document of that world, and its ways to be wrong: A LINE PER DOCUMENT
commands.py   each command, and what it promises of its answer: A LINE PER COMMAND
values.py     odd values for a field; trees.py puts them into JSON; tensors.py, hdf5.py, text.py
places.py     what may stand in the place of a file or a folder
seals.py      checksums recomputed, as a forger does
oracle.py     what a reader other than ours sees
sandbox.py    one command in a process of its own, limited in time and memory
cases.py      all (document, change, command), a fair sample of them, and one case from end to end
"""
