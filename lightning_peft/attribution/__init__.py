"""What a network's parts contribute: scores that selections are made from."""
