"""Messages in, reply out: the chat on the terminal, one reply, and many replies at a time."""
