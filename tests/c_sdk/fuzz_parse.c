/* Whatever the text: parse_data() stays within its buffers, and what it takes has the checksum, computed here anew. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "triple_burn.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint32_t crc(uint32_t value, const char *text)
{
    int bit;

    for (value = ~value; *text != '\0'; text++)
        for (value ^= (unsigned char)*text, bit = 0; bit < 8; bit++)
            value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0u);
    return ~value;
}

static char *block(size_t size)
{
    char *memory = malloc(size);

    if (memory == NULL)
        abort();
    memset(memory, '?', size);
    return memory;
}

/* The checksum must stand in the text, in one of its two forms, unless an escape hides it. */
static void check(const char *text, const triple_reply *reply)
{
    uint32_t sum = crc(crc(crc(crc(crc(0, reply->product_key), reply->device_name), reply->device_secret),
                           reply->product_secret), reply->product_id);
    const char *at = text;
    int found = strchr(text, '\\') != NULL;

    while (*at != '\0' && !found) {
        char *end;

        found = strtoul(at, &end, 16) == sum || strtoul(at, &end, 10) == sum;
        at++;
    }
    if (!found)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *text = block(size + 1);
    char *pk = block(PRODUCT_KEY_LEN), *dn = block(DEVICE_NAME_LEN), *ps = block(PRODUCT_SECRET_LEN);
    char *ds = block(DEVICE_SECRET_LEN), *did = block(DEVICE_ID_LEN);
    triple_reply reply;
    int result;

    memcpy(text, data, size);
    text[size] = '\0';
    result = parse_data(text, pk, dn, ps, ds, did);
    if ((parse_data)(text, pk, dn, ps, ds, did) != result) /* the function, for callers without the macro */
        abort();
    if (result == TRIPLE_OK) {
        if (triple_parse(text, strlen(text), &reply) != TRIPLE_OK || !reply.has_certificate ||
            strcmp(pk, reply.product_key) != 0 || strcmp(dn, reply.device_name) != 0 ||
            strcmp(ps, reply.product_secret) != 0 || strcmp(ds, reply.device_secret) != 0 ||
            strcmp(did, reply.device_id) != 0)
            abort();
        check(text, &reply);
    } else if (*pk != '?' || *dn != '?' || *ps != '?' || *ds != '?' || *did != '?') {
        abort();
    }
    triple_parse((const char *)data, size, &reply); /* with the NULs that may be in it */
    free(text);
    free(pk);
    free(dn);
    free(ps);
    free(ds);
    free(did);
    return 0;
}
