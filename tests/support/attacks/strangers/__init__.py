"""Give damaged and forged files to every command, and check the commands' guarantees.

    python -m tests.support.attacks.strangers --cases 20000 --seed 0

world.py      one small real file of every kind that can be shared, and a folder next to them
documents.py  each document of that world with its possible faults: A LINE PER DOCUMENT
commands.py   each command with the guarantees for its answer: A LINE PER COMMAND
values.py     odd values for a field; trees.py puts them into JSON; tensors.py, hdf5.py, text.py
places.py     replacements of a file or a folder
seals.py      recomputed checksums, as a forger would
oracle.py     the content that other readers find
sandbox.py    one command in its own process, limited in time and memory
cases.py      all (document, change, command), a balanced sample, and a whole case
"""
