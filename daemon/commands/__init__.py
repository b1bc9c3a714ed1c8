"""The commands of the `maskd` program, one file each."""
