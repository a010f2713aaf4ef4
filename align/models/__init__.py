"""What any audio language model shares: packing, clip features, chats, shards; and a folder per family."""
