//! Sizes as people write and read them. Exact: parsing never goes through floating point.

/// Parses a size such as `80GiB`, `1.5 GB`, `512MiB` or `4096` (bytes). Powers of 1024 with an
/// `i`, of 1000 without; a fraction must come out as whole bytes or is rounded down.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = (text[..split].trim_end(), &text[split..]);
    let scale: u128 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(format!("`{text}`: the unit must be one of B, KiB to TiB, KB to TB")),
    };
    let value = decimal(number, scale).ok_or_else(|| format!("`{text}` is not a size"))?;
    u64::try_from(value).map_err(|_| format!("`{text}` does not fit in 64 bits"))
}

/// Parses a fraction below 1, `0.1` or `10%`, into parts per million.
pub fn parse_ppm(text: &str) -> Result<u32, String> {
    let (number, scale) = match text.trim().strip_suffix('%') {
        Some(percent) => (percent, 10_000),
        None => (text.trim(), 1_000_000),
    };
    decimal(number, scale)
        .filter(|&ppm| ppm < 1_000_000)
        .map(|ppm| ppm as u32) // below a million
        .ok_or_else(|| format!("`{text}` is not a fraction from 0 to below 1, or a percentage"))
}

/// `number * scale`, rounded down, for a plain decimal number of at most 18 digits on each side.
fn decimal(number: &str, scale: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits_ok = |digits: &str| digits.len() <= 20 && digits.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits_ok(whole) || !digits_ok(fraction) || fraction.len() > 18 {
        return None;
    }
    if number.ends_with('.') {
        return None;
    }
    let whole = whole.parse::<u128>().ok()?.checked_mul(scale)?;
    if fraction.is_empty() {
        return Some(whole);
    }
    let part =
        fraction.parse::<u128>().ok()?.checked_mul(scale)? / 10u128.pow(fraction.len() as u32);
    whole.checked_add(part)
}

/// Bytes with a binary prefix and two decimals, whole bytes below 1 KiB.
pub fn binary(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let power = (bytes.max(1).ilog2() / 10) as usize;
    if power == 0 {
        return format!("{bytes} B");
    }
    format!("{:.2} {}", bytes as f64 / (1u64 << (10 * power)) as f64, UNITS[power])
}

/// A count with a comma after every three digits.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at != 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_both_kinds_of_prefix() {
        assert_eq!(parse_bytes("80GiB"), Ok(80 << 30));
        assert_eq!(parse_bytes("80 GB"), Ok(80_000_000_000));
        assert_eq!(parse_bytes("1.5kib"), Ok(1536));
        assert_eq!(parse_bytes("0.1GB"), Ok(100_000_000));
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("18446744073709551615"), Ok(u64::MAX));
        for bad in ["", "GiB", "-1", "1e9", "1..2", "1.", ".5", "80 Gbit", "1,000", "17000000TiB"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
        assert!(parse_bytes("18446744073709551616").is_err());
    }

    #[test]
    fn fractions_and_percentages() {
        assert_eq!(parse_ppm("0.1"), Ok(100_000));
        assert_eq!(parse_ppm("10%"), Ok(100_000));
        assert_eq!(parse_ppm("0"), Ok(0));
        for bad in ["1", "100%", "1.5", "-0.1", "", "%", "NaN"] {
            assert!(parse_ppm(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(binary(0), "0 B");
        assert_eq!(binary(1023), "1023 B");
        assert_eq!(binary(2 << 30), "2.00 GiB");
        assert_eq!(binary(u64::MAX), "16.00 EiB");
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_000_000), "1,000,000");
    }
}
