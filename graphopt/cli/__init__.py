"""The command line: ``graphopt opt``, ``graphopt explain``, ``graphopt doctor``."""
