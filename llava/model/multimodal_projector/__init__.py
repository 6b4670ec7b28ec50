"""The projectors from vision to language."""
