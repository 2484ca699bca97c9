"""What every layer may use: checks of arguments, variables, private names of Keras and TensorFlow."""
