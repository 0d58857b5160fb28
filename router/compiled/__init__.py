"""The parts of a placement that are compiled where there is a C++ compiler.

`library` builds and loads them, `matching` is what `BlockIndex.match` is by definition, `ranking` what `PairCosts` is.
Without a compiler these definitions, and the arrays of `pair_matrix`, do it all.
"""
