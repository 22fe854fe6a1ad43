"""One script for each version of our tables; a new one only adds, so that readers of the version before go on."""
