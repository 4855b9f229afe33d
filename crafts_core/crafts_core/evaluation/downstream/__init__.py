"""What a generator's images add to the work of somebody who has real tiles."""
