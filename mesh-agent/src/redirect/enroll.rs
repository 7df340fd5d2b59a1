//! A pod's places in the kernel's tables, filled in the order in which nothing is open in between. In: a pod with its
//! listeners. Out: its traffic at the listeners.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::{MutexGuard, PoisonError};

use mesh_common::{ENROLLED_ENTRIES, Ip, PodEntry as Entry, slot};

use super::load::Loader;
use super::maps::Maps;
use super::{NetnsCookie, PodEntry, Redirect, RedirectError, attach, pins};

/// A pod's places in the kernel's tables.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Placed {
    pub index: u32,
    pub addresses: Vec<Ip>,
}

pub type Pods = BTreeMap<NetnsCookie, Placed>;

/// Pods that an earlier agent enrolled. Their sk_lookup programs steer by these indices.
pub fn restore(maps: &Maps) -> Result<Pods, RedirectError> {
    let mut pods = Pods::new();
    for cookie in maps.enrolled.keys()? {
        if let Some(entry) = maps.enrolled.get(&cookie)? {
            pods.insert(NetnsCookie(cookie), Placed { index: entry.index, addresses: Vec::new() });
        }
    }
    for ip in maps.pod_addrs.keys()? {
        let Some(index) = maps.pod_addrs.get(&ip)? else { continue };
        match pods.values_mut().find(|pod| pod.index == index) {
            Some(pod) => pod.addresses.push(ip),
            // Of a pod whose enrolment did not come to its end.
            None => drop(maps.pod_addrs.remove(&ip)?),
        }
    }
    Ok(pods)
}

pub fn join(redirect: &Redirect, pod: &PodEntry, netns: BorrowedFd<'_>) -> Result<(), RedirectError> {
    let Redirect { maps, pins, node_netns, .. } = redirect;
    if pod.cookie == *node_netns {
        return Err(RedirectError::HostNetwork { cookie: pod.cookie });
    }
    let mut held = lock(redirect);
    let (pods, loader) = &mut *held;
    let before = pods.get(&pod.cookie).cloned();
    let index = match &before {
        Some(known) => known.index,
        None => free_index(pods, redirect)?,
    };
    maps.set_listener(index * slot::PER_POD + slot::PLAIN, pod.plain_listener)?;
    maps.set_listener(index * slot::PER_POD + slot::HBONE, pod.hbone_listener)?;
    let pin = pins.pod(pod.cookie, index);
    if !attach::is_pinned(&pin) {
        let mut object = loader.prepare(index)?;
        attach::to_netns(&mut object, netns, &pin)?;
    }
    // Links of an older object, or of an index that the pod had before: the new one is in force by now.
    for other in pins.pod_pins()?.into_iter().filter(|other| other.cookie == pod.cookie && other.path != pin) {
        pins::remove_link(&other.path)?;
    }
    let addresses: Vec<Ip> = pod.addresses.iter().map(|ip| Ip::from(*ip)).collect();
    for ip in &addresses {
        maps.pod_addrs.set(ip, &index)?;
    }
    for gone in before.iter().flat_map(|known| &known.addresses).filter(|ip| !addresses.contains(ip)) {
        forget_address(maps, gone, index)?;
    }
    maps.enrolled.set(&pod.cookie.0, &entry_of(&pod.addresses, index))?;
    pods.insert(pod.cookie, Placed { index, addresses });
    Ok(())
}

pub fn leave(redirect: &Redirect, cookie: NetnsCookie) -> Result<(), RedirectError> {
    let Redirect { maps, pins, .. } = redirect;
    let mut held = lock(redirect);
    let (pods, _) = &mut *held;
    maps.enrolled.remove(&cookie.0)?;
    if let Some(known) = pods.get(&cookie) {
        for ip in &known.addresses {
            forget_address(maps, ip, known.index)?;
        }
    }
    for pin in pins.pod_pins()?.into_iter().filter(|pin| pin.cookie == cookie) {
        pins::remove_link(&pin.path)?;
        for which in [slot::PLAIN, slot::HBONE] {
            maps.listeners.remove(&(pin.index * slot::PER_POD + which))?;
        }
    }
    pods.remove(&cookie);
    Ok(())
}

fn lock(redirect: &Redirect) -> MutexGuard<'_, (Pods, Loader)> {
    // The table is changed last of all: it is whole whatever panicked.
    redirect.pods.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The lowest index that no pod and no pinned sk_lookup program has.
fn free_index(pods: &Pods, redirect: &Redirect) -> Result<u32, RedirectError> {
    let mut taken: Vec<u32> = pods.values().map(|pod| pod.index).collect();
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

/// The first address of each family is the one that is bound.
fn entry_of(addresses: &[IpAddr], index: u32) -> Entry {
    let first = |v4: bool| addresses.iter().map(IpAddr::to_canonical).find(|ip| ip.is_ipv4() == v4);
    let ip = |v4: bool| first(v4).map_or(Ip::UNSPECIFIED, Ip::from);
    Entry { index, flags: 0, v4: ip(true), v6: ip(false) }
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
    fn the_first_address_of_each_family_is_bound() {
        let addresses = ["fd00::1", "::ffff:10.0.0.1", "10.0.0.2"].map(|ip| ip.parse().unwrap());
        let entry = entry_of(&addresses, 3);
        assert_eq!(IpAddr::from(entry.v4).to_string(), "10.0.0.1");
        assert_eq!(IpAddr::from(entry.v6).to_string(), "fd00::1");
        assert_eq!(entry_of(&addresses[..1], 3).v4, Ip::UNSPECIFIED);
    }
}
