"""Models: where they are (`locate`), how they are loaded (`load`), and what the hardware does best (`hardware`)."""
