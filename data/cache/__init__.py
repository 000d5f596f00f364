"""Feature caches: what frozen networks make of a data set, computed once, kept in shards and read back in training.

`extract` turns items into features, `build` writes them (resumable), `store` reads them, `verify` checks them; `shards`
is the file format, `keys` says what an entry was made from.
"""
