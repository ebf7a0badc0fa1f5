"""`kvcached serve` over several hosts, on Ray. Only `hosts.ray_nodes` imports Ray."""
