"""The engine core: scheduler and model runner stepped together, in this process or in one of its own."""
