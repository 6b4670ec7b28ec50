"""Running the model on images and questions."""
