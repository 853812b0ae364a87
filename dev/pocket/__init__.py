"""How the pocket is made: an authors' tool, which is not installed. See README.md beside this file."""
