"""The run-time type checker of the tests: beartype, with int taken where float is asked for, as PEP 484 has it."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
