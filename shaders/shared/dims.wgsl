// dims: query heads, key/value heads, and the size of a head.
override H: u32;
override HK: u32;
override DH: u32;
