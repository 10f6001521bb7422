"""Checks of arguments, and the errors that say what to do."""
