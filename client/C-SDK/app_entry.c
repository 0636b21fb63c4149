/* The device's console command `linkkey`, for the app_entry.c of an AliOS Things application such as living_platform:
 *
 *     linkkey                             show the certificate that the device has
 *     linkkey SERVER PRODUCTKEY [DID]     request one, burn it and report; without DID it may waste a certificate
 *     linkkey PK DN DS PS                 write one by hand
 *
 * "Burning" is writing to the key-value store, under the names that the vendor's device SDK reads. */
#include <string.h>

#include <aos/cli.h>
#include <aos/kv.h>

#include "triple_burn.h"

/* Of the vendor's device SDK. */
uint32_t HAL_Wifi_Get_IP(char *ip_str, const char *ifname);

void linkkey_register(void);

/* Write one value and read it back; 0 when the device holds it. */
static int store(const char *key, const char *value)
{
    char back[TRIPLE_FIELD_SIZE] = {0};
    int size = (int)strlen(value) + 1, back_size = sizeof back;

    if (aos_kv_set(key, (void *)(uintptr_t)value, size, 1) != 0)
        return -1;
    return aos_kv_get(key, back, &back_size) == 0 && strcmp(back, value) == 0 ? 0 : -1;
}

/* What does not fit is refused before the first value is written, or it would stand beside half of the one before. */
static int burn(const char *pk, const char *dn, const char *ds, const char *ps)
{
    if (strlen(pk) >= TRIPLE_FIELD_SIZE || strlen(dn) >= TRIPLE_NAME_SIZE || strlen(ds) >= TRIPLE_FIELD_SIZE ||
        strlen(ps) >= TRIPLE_FIELD_SIZE)
        return -1;
    if (store("linkkit_product_key", pk) != 0 || store("linkkit_device_name", dn) != 0 ||
        store("linkkit_device_secret", ds) != 0 || store("linkkit_product_secret", ps) != 0)
        return -1;
    return 0;
}

/* send_req() has repeated already what may be repeated: asking again with no DeviceID would take a second certificate.
 * triple_parse() and not parse_data(): the lengths of the vendor's headers leave no room for the NUL of the longest. */
static void get_triple(char *server_ip, char *productKey, char *deviceid)
{
    char ip_addr[32] = {0};
    triple_reply cert;
    char *did;
    char *reply;
    int result, burnt;

    HAL_Wifi_Get_IP(ip_addr, NULL);
    if (strlen(ip_addr) <= 5) {
        aos_cli_printf("The device has no IP address: connect it, then try again.\r\n");
        return;
    }
    reply = send_req(TRIPLE_ACTION_REQUEST, productKey, deviceid, server_ip);
    if (reply == NULL) {
        aos_cli_printf("No certificate.\r\n");
        return;
    }
    result = triple_parse(reply, strlen(reply), &cert);
    HAL_Free(reply);
    if (result != TRIPLE_OK) {
        aos_cli_printf("%s\r\n", triple_error(result));
        return;
    }
    did = cert.device_id[0] != '\0' ? cert.device_id : deviceid; /* a server that makes up no DeviceID */
    if (deviceid[0] == '\0' && did[0] != '\0') /* where the power fails while it burns, only this leads back to it */
        aos_cli_printf("The server calls this device %s.\r\n", did);

    burnt = burn(cert.product_key, cert.device_name, cert.device_secret, cert.product_secret) == 0;
    aos_cli_printf("%s pk=%s dn=%s did=%s\r\n", burnt ? "Burnt:" : "Not burnt, the store failed:", cert.product_key,
                   cert.device_name, did);
    if (did[0] == '\0') {
        aos_cli_printf("The server told no DeviceID, so it cannot be told of the burn. Do not repeat the command.\r\n");
        return;
    }
    reply = send_req(burnt ? TRIPLE_ACTION_BURN_SUCCEEDED : TRIPLE_ACTION_BURN_FAILED, productKey, did, server_ip);
    if (reply == NULL)
        aos_cli_printf("The server does not know it yet: repeat the command with the DeviceID %s.\r\n", did);
    HAL_Free(reply);
}

static void show(const char *title, const char *key)
{
    char value[TRIPLE_FIELD_SIZE + 1] = {0}; /* one more: what other firmware wrote may have no NUL */
    int size = sizeof value - 1;

    if (aos_kv_get(key, value, &size) != 0)
        value[0] = '\0';
    aos_cli_printf("%s=%s.\r\n", title, value);
}

static void handle_linkkey_cmd(char *pwbuf, int blen, int argc, char **argv)
{
    char none[] = "";

    (void)pwbuf;
    (void)blen;
    if (argc == 1) {
        show("Product Key", "linkkit_product_key");
        show("Device Name", "linkkit_device_name");
        show("Device Secret", "linkkit_device_secret");
        show("Product Secret", "linkkit_product_secret");
    } else if (argc == 3) {
        get_triple(argv[1], argv[2], none);
    } else if (argc == 4) {
        get_triple(argv[1], argv[2], argv[3]);
    } else if (argc == 5) {
        if (burn(argv[1], argv[2], argv[3], argv[4]) == 0)
            aos_cli_printf("Done\r\n");
        else
            aos_cli_printf("Not written: a value is too long, or the store failed.\r\n");
    } else {
        aos_cli_printf("Usage: linkkey [SERVER PRODUCTKEY [DID] | PK DN DS PS]\r\n");
    }
}

static const struct cli_command linkkey = {
    "linkkey", "linkkey [SERVER PRODUCTKEY [DID] | PK DN DS PS]", handle_linkkey_cmd};

/* Call it where the application registers its other commands. */
void linkkey_register(void)
{
    aos_cli_register_command(&linkkey);
}
