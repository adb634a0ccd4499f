// routing: how many experts there are, and to how many of them a token goes.
override E: u32;
override A: u32;
