"""Keep the ranks of a distributed run in agreement."""
