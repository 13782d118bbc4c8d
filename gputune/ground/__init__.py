"""Names, messages, memory, files and random streams for all other packages.

Read ``types`` (axes, names, defaults) and ``errors`` (messages and exceptions) first. ``text``
formats for people, ``files`` reads and writes, ``memory`` and ``device`` measure what is free,
``seeding`` makes random streams, ``within_epoch`` passes on progress, and ``entry_points`` imports
other libraries.
"""
