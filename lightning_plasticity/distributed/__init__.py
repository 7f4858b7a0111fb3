"""Keep ranks in agreement and gather sharded weights, without Lightning."""
