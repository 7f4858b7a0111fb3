"""Connect the engine to the Trainer of Lightning."""
