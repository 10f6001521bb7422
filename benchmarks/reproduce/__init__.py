"""Tables of published results, measured again: one program for each table, and one for README.md."""
