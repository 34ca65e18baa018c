"""HTTP itself: what comes in passes the middleware, and errors go out. It knows neither callers nor models."""
