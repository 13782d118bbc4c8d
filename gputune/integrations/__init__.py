"""Integrations with other libraries: one module each. ``entry_points.py`` says how gputune finds
them.

The other packages of gputune import nothing from here.
"""
