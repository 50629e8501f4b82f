"""The engine: a queue of images, batches, decoding and the threads that run an encoder on its device."""
