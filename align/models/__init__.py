"""Parts that audio language models share: packing, clip features, chats, shards; and a folder per family."""
