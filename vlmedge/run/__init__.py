"""From a picture to an answer: inputs, the decode loop, the tasks, and the model itself."""
