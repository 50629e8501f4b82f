"""From a queue of images to rows: batches, threads and the device."""
