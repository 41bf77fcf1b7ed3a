"""The devices: the mesh, their memory, the processes that share them."""
