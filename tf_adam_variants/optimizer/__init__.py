"""The Keras side: from `apply` to the engine."""
