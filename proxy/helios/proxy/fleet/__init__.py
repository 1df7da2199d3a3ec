"""Workers and their replicas as the proxy believes them: the state (pure), and the session that feeds it."""
