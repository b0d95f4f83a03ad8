"""The command line: a file for each command, which declares options and shows results."""
