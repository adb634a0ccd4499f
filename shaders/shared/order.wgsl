// order: bits of f32 as u32 in the order of their values, of zeros of both signs one; never NaN. Integers, so that it does not
// matter whether a device has numbers below 2^-126. The largest of no numbers is NEVER.
const NEVER = 0x007fffffu; // minus infinity

fn order(bits: u32) -> u32 {
    let positive = select(bits, 0u, bits == 0x80000000u);
    return positive ^ select(0x80000000u, 0xffffffffu, (positive >> 31u) == 1u);
}

fn bits_of(place: u32) -> u32 {
    return place ^ select(0xffffffffu, 0x80000000u, (place >> 31u) == 1u);
}
