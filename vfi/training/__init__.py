"""Training: the trainer, losses, optimizer, gradient monitor and what a resumed run needs."""
