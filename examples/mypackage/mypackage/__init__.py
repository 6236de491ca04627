"""A package of one's own, outside the project: a part of every kind, and options that choose
them.
"""
