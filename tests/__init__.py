"""Everything that must hold; each folder tests the folder of the same name."""
