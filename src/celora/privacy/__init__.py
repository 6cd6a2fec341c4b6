"""What keeps a server from reading what it adds up: keys that only clients hold, and what is made with them."""
