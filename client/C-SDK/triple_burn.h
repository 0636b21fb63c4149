/* Ask a certtool server for a device certificate, and tell it what became of the burn.
 *
 *     send_req() + parse_data()       the two functions of the vendor's page: text on the heap
 *     triple_request()                both in one, with your buffers, no heap, the reason of a failure, ProductID
 *     triple_parse()                  the reply alone
 *
 * Nothing here keeps state: every function may run in several tasks at once, each with its own buffers. */
#ifndef TRIPLE_BURN_H
#define TRIPLE_BURN_H

#include <stddef.h>
#include <stdint.h>

#include "triple_hal.h" /* HAL_Free(), for the string of send_req() */

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Actions ---------------------------------------------------------------------------------------------------- */

#define TRIPLE_ACTION_REQUEST 0        /* give this device its certificate */
#define TRIPLE_ACTION_BURN_SUCCEEDED 1 /* the certificate was written and read back */
#define TRIPLE_ACTION_BURN_FAILED 2    /* it could not be written */

/* ---- Results ---------------------------------------------------------------------------------------------------- */

#define TRIPLE_OK 0
#define TRIPLE_ARGUMENT (-1) /* a missing, too long or unprintable argument; nothing was sent */
#define TRIPLE_BUFFER (-2)   /* a buffer is too small: for the request, the reply or one value */
#define TRIPLE_MEMORY (-3)   /* HAL_Malloc() gave none */
#define TRIPLE_NETWORK (-4)  /* no connection, or it broke before the reply was whole */
#define TRIPLE_TIMEOUT (-5)  /* no whole reply in time */
#define TRIPLE_HTTP (-6)     /* the reply is not the HTTP of a certtool server: another server answers there */
#define TRIPLE_REPLY (-7)    /* not one JSON object with the fields of the protocol, or a value breaks its limits */
#define TRIPLE_REFUSED (-8)  /* the server said no; triple_reply.status has its word, such as PoolExhausted */
#define TRIPLE_CRC (-9)      /* the checksum does not belong to this certificate: do not burn it */
#define TRIPLE_MISMATCH (-10) /* a certificate of another product or device than asked for: do not burn it */

/* ---- Sizes, in bytes, the closing NUL included -------------------------------------------------------------------- */

#define TRIPLE_FIELD_SIZE 65 /* the protocol allows 64 characters */
#define TRIPLE_NAME_SIZE 33  /* a DeviceName 32 */
#define TRIPLE_STATUS_SIZE 33

/* The page's names. A buffer [X_LEN] holds the longest value and its NUL; [X_LEN + 1], as the page also writes, does too.
 * A platform header may have defined smaller ones: parse_data() then keeps to those. */
#ifndef PRODUCT_KEY_LEN
#define PRODUCT_KEY_LEN TRIPLE_FIELD_SIZE
#endif
#ifndef PRODUCT_SECRET_LEN
#define PRODUCT_SECRET_LEN TRIPLE_FIELD_SIZE
#endif
#ifndef DEVICE_NAME_LEN
#define DEVICE_NAME_LEN TRIPLE_NAME_SIZE
#endif
#ifndef DEVICE_SECRET_LEN
#define DEVICE_SECRET_LEN TRIPLE_FIELD_SIZE
#endif
#ifndef DEVICE_ID_LEN
#define DEVICE_ID_LEN PRODUCT_SECRET_LEN /* the page's get_triple() declares its DeviceID with this length */
#endif

/* ---- Settings: give another value to the compiler with -D when it builds triple_burn.c ----------------------------- */

#ifndef TRIPLE_PORT
#define TRIPLE_PORT 8000 /* where the server's address names none */
#endif
#ifndef TRIPLE_TOTAL_MS
#define TRIPLE_TOTAL_MS 15000u /* for everything, attempts and pauses together */
#endif
#ifndef TRIPLE_ATTEMPT_MS
#define TRIPLE_ATTEMPT_MS 5000u /* for one attempt; without a DeviceID it is waited for until the end */
#endif
#ifndef TRIPLE_ATTEMPTS
#define TRIPLE_ATTEMPTS 4u
#endif
#ifndef TRIPLE_PAUSE_MS
#define TRIPLE_PAUSE_MS 500u /* before the second attempt; doubles each time */
#endif
#ifndef TRIPLE_BUFFER_SIZE
#define TRIPLE_BUFFER_SIZE 1536u /* what send_req() allocates: one whole reply, head and body */
#endif

/* ---- The functions of the page ------------------------------------------------------------------------------------ */

/* Send one request and return the server's JSON, checked as triple_request() does.
 *
 *   act        a TRIPLE_ACTION_
 *   pk         ProductKey
 *   did        DeviceID, at most 64 printable ASCII characters; "" or NULL: the device has none and takes a fresh
 *              certificate, with a DeviceID that the server makes up. Actions 1 and 2 need one
 *   server_ip  "host" or "host:port": a name of at most 63 characters or an IPv4 address; no IPv6 address
 *
 * Returns a string that the caller gives to HAL_Free(), or NULL: the reason went to HAL_Triple_Log(). */
char *send_req(int act, char *pk, char *did, const char *server_ip);

/* Take the certificate out of the reply to action 0 and verify its CRC32.
 *
 * Each buffer has the size that its _LEN macro gives; NULL leaves a value out. Returns TRIPLE_OK, or TRIPLE_ARGUMENT,
 * _BUFFER, _REPLY, _REFUSED or _CRC with every buffer as it was. */
int parse_data(const char *data, char *pk, char *dn, char *ps, char *ds, char *did);

/* The lengths are those in force where the call stands, so they are those of the caller's buffers. */
#define parse_data(data, pk, dn, ps, ds, did)                                                                     \
    triple_parse_data((data), (pk), PRODUCT_KEY_LEN, (dn), DEVICE_NAME_LEN, (ps), PRODUCT_SECRET_LEN, (ds),            \
                      DEVICE_SECRET_LEN, (did), DEVICE_ID_LEN)

/* ---- Bounded, without heap ---------------------------------------------------------------------------------------- */

/* A reply. Values that it did not have are "". */
typedef struct {
    char product_key[TRIPLE_FIELD_SIZE];
    char device_name[TRIPLE_NAME_SIZE];
    char device_secret[TRIPLE_FIELD_SIZE];
    char product_secret[TRIPLE_FIELD_SIZE];
    char product_id[TRIPLE_FIELD_SIZE];
    char device_id[TRIPLE_FIELD_SIZE];
    char status[TRIPLE_STATUS_SIZE];
    int has_certificate; /* 0 for the reply to a report */
} triple_reply;

/* Send one request, check the reply and take it apart: as send_req(), in `buffer`, which then holds the JSON.
 *
 * The buffer first carries the request, then the whole reply: TRIPLE_BUFFER_SIZE is ample.
 *
 * An attempt that failed on the way is repeated within TRIPLE_ATTEMPTS and TRIPLE_TOTAL_MS. That is safe with a DeviceID:
 * the server answers the same certificate. Without one a repeated request would take a second certificate, so it is
 * repeated only as long as nothing was sent.
 *
 * `pk` and `did` may lie in `reply`, so that a made-up DeviceID can be passed on; keep a copy of it, for a call that
 * fails forgets it.
 *
 * Returns a TRIPLE_ result; `reply` is all zero unless it is TRIPLE_OK, but for `status` on TRIPLE_REFUSED. */
int triple_request(int act, const char *pk, const char *did, const char *server, char *buffer, size_t size,
                   triple_reply *reply);

/* Read `length` bytes of JSON as a reply. Returns TRIPLE_OK (Status is OK, and if there is a certificate it is complete
 * and its CRC32 right), TRIPLE_REPLY, _REFUSED or _CRC; `reply` as above. */
int triple_parse(const char *json, size_t length, triple_reply *reply);

/* parse_data() with the sizes of the buffers. */
int triple_parse_data(const char *data, char *pk, size_t pk_size, char *dn, size_t dn_size, char *ps, size_t ps_size,
                      char *ds, size_t ds_size, char *did, size_t did_size);

/* Return one sentence about a TRIPLE_ result. */
const char *triple_error(int result);

#ifdef __cplusplus
}
#endif

#endif
