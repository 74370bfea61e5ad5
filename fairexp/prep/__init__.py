"""Text -> token shards (`fairexp prep`): files into blocks, blocks into tokens, tokens into shards. No torch."""
