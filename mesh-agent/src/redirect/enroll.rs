//! A pod's places in the kernel's tables, filled in the order in which nothing is open in between. In: a pod with its
//! listeners. Out: its traffic at the listeners.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::{MutexGuard, PoisonError};

use mesh_common::{ENROLLED_ENTRIES, Ip, MAX_POD_ADDRESSES, PodEntry as Entry, slot};

use super::maps::Maps;
use super::{NetnsCookie, PodEntry, Redirect, RedirectError, attach, load, pins};

/// Pods that an earlier agent enrolled. Their sk_lookup programs steer by these indices.
pub fn restore(maps: &Maps) -> Result<BTreeMap<NetnsCookie, u32>, RedirectError> {
    let mut pods = BTreeMap::new();
    for cookie in maps.enrolled.keys()? {
        if let Some(entry) = maps.enrolled.get(&cookie)? {
            pods.insert(NetnsCookie(cookie), entry.index);
        }
    }
    Ok(pods)
}

pub fn join(redirect: &Redirect, pod: &PodEntry, netns: BorrowedFd<'_>) -> Result<(), RedirectError> {
    let Redirect { maps, pins, options, globals, .. } = redirect;
    if pod.cookie.0 == globals.node_netns {
        return Err(RedirectError::HostNetwork { cookie: pod.cookie });
    }
    let mut pods = lock(redirect);
    let known = pods.get(&pod.cookie).copied();
    let index = match known {
        Some(index) => index,
        None => free_index(&pods, redirect)?,
    };
    let entry = entry_of(pod, index)?;
    let before = maps.enrolled.get(&pod.cookie.0)?;

    maps.set_listener(index * slot::PER_POD + slot::PLAIN, pod.plain_listener)?;
    maps.set_listener(index * slot::PER_POD + slot::HBONE, pod.hbone_listener)?;
    let pin = pins.pod(pod.cookie, index);
    if !attach::is_pinned(&pin) {
        let mut object = load::prepare(options, pins, globals, index)?;
        attach::to_netns(&mut object, netns, &pin)?;
    }
    // Links of an older object, or of an index that the pod had before: the new one is in force by now.
    for other in pins.pod_pins()?.into_iter().filter(|other| other.cookie == pod.cookie && other.path != pin) {
        pins::remove(&other.path)?;
    }
    let addresses = addresses_of(&entry);
    for ip in &addresses {
        maps.pod_addrs.set(ip, &index)?;
    }
    for gone in before.iter().flat_map(addresses_of).filter(|ip| !addresses.contains(ip)) {
        forget_address(maps, &gone, index)?;
    }
    maps.enrolled.set(&pod.cookie.0, &entry)?;
    pods.insert(pod.cookie, index);
    Ok(())
}

pub fn leave(redirect: &Redirect, cookie: NetnsCookie) -> Result<(), RedirectError> {
    let Redirect { maps, pins, .. } = redirect;
    let mut pods = lock(redirect);
    let entry = maps.enrolled.get(&cookie.0)?;
    maps.enrolled.remove(&cookie.0)?;
    for ip in entry.iter().flat_map(addresses_of) {
        forget_address(maps, &ip, entry.map_or(u32::MAX, |entry| entry.index))?;
    }
    for pin in pins.pod_pins()?.into_iter().filter(|pin| pin.cookie == cookie) {
        pins::remove(&pin.path)?;
        for which in [slot::PLAIN, slot::HBONE] {
            maps.listeners.remove(&(pin.index * slot::PER_POD + which))?;
        }
    }
    pods.remove(&cookie);
    Ok(())
}

fn lock(redirect: &Redirect) -> MutexGuard<'_, BTreeMap<NetnsCookie, u32>> {
    // The map is changed last of all: it is whole whatever panicked.
    redirect.pods.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The lowest index that no pod and no pinned sk_lookup program has.
fn free_index(pods: &BTreeMap<NetnsCookie, u32>, redirect: &Redirect) -> Result<u32, RedirectError> {
    let mut taken: Vec<u32> = pods.values().copied().collect();
    taken.extend(redirect.pins.pod_pins()?.iter().map(|pin| pin.index));
    taken.sort_unstable();
    taken.dedup();
    lowest_free(&taken).ok_or(RedirectError::TooManyPods { limit: ENROLLED_ENTRIES })
}

/// `taken` is sorted and without repetition.
fn lowest_free(taken: &[u32]) -> Option<u32> {
    let gap = taken.iter().zip(0u32..).find(|(used, expected)| **used != *expected).map(|(_, expected)| expected);
    let free = gap.unwrap_or(taken.len() as u32);
    (free < ENROLLED_ENTRIES).then_some(free)
}

fn entry_of(pod: &PodEntry, index: u32) -> Result<Entry, RedirectError> {
    let mut entry = Entry { index, ..Entry::default() };
    let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) =
        pod.addresses.iter().map(|ip| ip.to_canonical()).partition(IpAddr::is_ipv4);
    for found in [v4.len(), v6.len()] {
        if found > MAX_POD_ADDRESSES {
            return Err(RedirectError::TooManyAddresses { cookie: pod.cookie, found, most: MAX_POD_ADDRESSES });
        }
    }
    for (place, ip) in entry.v4.iter_mut().zip(v4) {
        *place = Ip::from(ip).0[3];
    }
    for (place, ip) in entry.v6.iter_mut().zip(v6) {
        *place = ip.into();
    }
    Ok(entry)
}

fn addresses_of(entry: &Entry) -> Vec<Ip> {
    let v4 = entry.v4.iter().filter(|ip| **ip != 0).map(|ip| Ip::v4(*ip));
    v4.chain(entry.v6.iter().filter(|ip| **ip != Ip::UNSPECIFIED).copied()).collect()
}

/// Unless the address has gone to another pod by now.
fn forget_address(maps: &Maps, ip: &Ip, index: u32) -> Result<(), RedirectError> {
    if maps.pod_addrs.get(ip)? == Some(index) {
        maps.pod_addrs.remove(ip)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(addresses: &[&str]) -> PodEntry {
        PodEntry {
            cookie: NetnsCookie(7),
            addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
            hbone_listener: -1,
            plain_listener: -1,
        }
    }

    #[test]
    fn the_lowest_free_index_is_taken() {
        assert_eq!(lowest_free(&[]), Some(0));
        assert_eq!(lowest_free(&[0, 1, 2]), Some(3));
        assert_eq!(lowest_free(&[0, 2, 3]), Some(1));
        assert_eq!(lowest_free(&[1]), Some(0));
        let all: Vec<u32> = (0..ENROLLED_ENTRIES).collect();
        assert_eq!(lowest_free(&all), None);
    }

    #[test]
    fn addresses_come_back_by_family() {
        let entry = entry_of(&pod(&["fd00::1", "10.0.0.1", "::ffff:10.0.0.2"]), 3).unwrap();
        let texts: Vec<String> = addresses_of(&entry).into_iter().map(|ip| IpAddr::from(ip).to_string()).collect();
        assert_eq!(texts, ["10.0.0.1", "10.0.0.2", "fd00::1"]);
        assert_eq!(entry.index, 3);
    }

    #[test]
    fn more_addresses_than_fit_are_refused() {
        let error = entry_of(&pod(&["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"]), 0).unwrap_err();
        assert!(error.to_string().contains("has 5 addresses of one family and at most 4"), "{error}");
    }
}
