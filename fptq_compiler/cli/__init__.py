"""The commands. They print; the library never does."""
